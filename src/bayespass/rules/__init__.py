"""How one operation changes a mean and a variance: one file per family of operations."""

from bayespass.rules import activation as activation
from bayespass.rules import affine as affine
from bayespass.rules import arithmetic as arithmetic
from bayespass.rules import attention as attention
from bayespass.rules import blocks as blocks
from bayespass.rules import embedding as embedding
from bayespass.rules import moving as moving
from bayespass.rules import multihead as multihead
from bayespass.rules import normalisation as normalisation
from bayespass.rules import placing as placing
from bayespass.rules import pointwise as pointwise
from bayespass.rules import pooling as pooling
from bayespass.rules import recurrent as recurrent
from bayespass.rules import resampling as resampling
from bayespass.rules import statistics as statistics
