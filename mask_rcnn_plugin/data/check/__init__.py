"""The check of datasets before a training: what is wrong, what it means, and a cleaned copy."""

from mask_rcnn_plugin.data.check.cleaning import clean
from mask_rcnn_plugin.data.check.dataset import Checked, check_file
from mask_rcnn_plugin.data.check.findings import KINDS, Findings
from mask_rcnn_plugin.data.check.splits import compare

__all__ = ["KINDS", "Checked", "Findings", "check_file", "clean", "compare"]
