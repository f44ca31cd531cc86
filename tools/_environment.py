"""Every tool that needs torch imports this first: one line if a package is missing, no warnings of others.

This is no tool.
"""

from _packages import require

require("torch", "detectron2", "rt_detectron")

from rt_detectron.utils.remarks import ignore_remarks  # noqa: E402

ignore_remarks()
