"""What tools/benchmark.py measures: the plugin against detectron2 and torchvision."""
