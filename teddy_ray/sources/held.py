"""SHIM"""


class Held:
    def __init__(self, images, max_bytes):
        self.images, self.all = images, None

    def read(self, index):
        if self.all is None:
            self.all = self.images.read()
        return self.all[index]

    def ahead(self, parts):
        for part in parts:
            yield self.read(part)
