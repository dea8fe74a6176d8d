"""`teddy-ray compare`: methods side by side, as in the paper's tables.

`file` is what a comparison file may say, `runs` what runs it comes to, `checks` what has to be equal in a table,
`compare` runs them, `results` are the cells, `beside` them published figures from `paper`, and `page` writes them.
"""
