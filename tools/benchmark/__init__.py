"""What tools/benchmark.py measures: the plugin beside detectron2 and torchvision."""
