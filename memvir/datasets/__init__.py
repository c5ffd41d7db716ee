"""Where images come from: each source knows how to fetch its files and how to arrange them by split and class.

A source is a module with two functions:
    download(data, source, target): fill `target` (dataset/D/download), with source.json saying what was used
    prepare(data, source, download, images, index): fill images/{train,test}/CLASS/* and write index.csv
"""

from memvir.datasets import cars196, folder, glyphs
from memvir.datasets.index import read_index

SOURCES = {"glyphs": glyphs, "cars196": cars196, "folder": folder}

__all__ = ["SOURCES", "read_index"]
