"""`teddy-ray compare`: methods side by side, as in the paper's tables.

`file` is what a comparison file may say, `runs` what runs it comes to, `compare` runs them, `results` are the cells,
beside published figures from `paper`, and `page` writes them.
"""
