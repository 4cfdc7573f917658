"""A small LeNet on plain arrays, for NumPy and CuPy alike: the parts of `lenet_digits.py`.

Read in this order: `layers` (convolution, pooling, dense, sigmoid, loss), `network` (LeNet with or without
`fastbn.BatchNorm`), `training` (the loop and its clock), `report` (table and plot). `data` and `idx` load images, `device` chooses
between NumPy and CuPy.
"""
