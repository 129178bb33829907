"""Operations of diffusion models on CPUs: linear layers, attention and convolutions.

Files, lowest first: `lanes` (vectors and dtypes), `team` (work on several threads),
`tile` (the product of a few rows), `matrix_unit` (the same by Intel's AMX), `rows`
(norms of rows), `product` (rows times a packed matrix), `heads` (attention),
`operations` (what graphs call), `images` (rows that convolutions read), `convolution`,
`convolution_operation` (those that graphs call).
"""
from .operations import *
from .convolution_operation import *
