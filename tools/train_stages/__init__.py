"""RPN and Mask R-CNN trained apart from each other (Sec. 3.1, 4.4)."""
