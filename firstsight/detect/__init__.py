"""Transfer to detection: annotated images in, boxes and masks out, and how good they are.

Data: `annotations` (what is in an image, read and checked), `segmentation_data` (index masks).
Figures: `figures` (COCO and VOC), `curves` (precision over recall), `pictures` (boxes drawn).
"""
