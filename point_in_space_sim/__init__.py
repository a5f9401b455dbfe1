import os

# Read once, when torch first multiplies on a CPU. oneDNN and its front end keep what they compiled for 1,024 shapes
# each, and every batch has a length of its own: a gigabyte a process, for nothing.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "40")
os.environ.setdefault("LRU_CACHE_CAPACITY", "40")
