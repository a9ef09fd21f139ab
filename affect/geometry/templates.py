# SPDX-License-Identifier: Apache-2.0
"""The mean face that crops are aligned to, and how points of other landmark schemes correspond to it.

The mean face is our own: the generalised Procrustes mean (``alignment.mean_shape``) of 400 photographs of 40 people
(the ORL database of AT&T Laboratories Cambridge), made mirror-symmetric. Each inner point is the mean of what
MediaPipe's face landmarker and face-api's 68-point network say; the jaw line is the network's alone, because the mesh
has no iBUG jaw line. No coordinates of an existing template were used. It is scaled so that its bounding square is the
unit square.
"""

from __future__ import annotations

import numpy as np

TEMPLATE_VERSION = "mean68-v1"
"""Name of the mean face in recipes. Another mean face is another version: models depend on it."""

# fmt: off
FACE_68 = np.array(
    [
        # jaw line
        *((0, 0.2043), (0.0104, 0.3347), (0.0323, 0.4567), (0.0556, 0.5669),),
        *((0.1, 0.6855), (0.1684, 0.7789), (0.2479, 0.8405), (0.3485, 0.9018),),
        *((0.5, 0.9389), (0.6515, 0.9018), (0.7521, 0.8405), (0.8316, 0.7789),),
        *((0.9, 0.6855), (0.9444, 0.5669), (0.9677, 0.4567), (0.9896, 0.3347),),
        *((1, 0.2043),),
        # brows
        *((0.1082, 0.1107), (0.1576, 0.0764), (0.2286, 0.0611), (0.3068, 0.0655), (0.3882, 0.0819),),
        *((0.6118, 0.0819), (0.6932, 0.0655), (0.7714, 0.0611), (0.8424, 0.0764), (0.8918, 0.1107),),
        # nose
        *((0.5, 0.1994), (0.5, 0.2875), (0.5, 0.3686), (0.5, 0.4314),),
        *((0.4014, 0.4858), (0.4494, 0.4979), (0.5, 0.5054), (0.5506, 0.4979),),
        *((0.5986, 0.4858),),
        # eyes
        *((0.2029, 0.203), (0.2457, 0.1797), (0.3111, 0.1764), (0.3756, 0.2107),),
        *((0.3198, 0.2245), (0.2533, 0.2265), (0.6244, 0.2107), (0.6889, 0.1764),),
        *((0.7543, 0.1797), (0.7971, 0.203), (0.7467, 0.2265), (0.6802, 0.2245),),
        # outer lip
        *((0.3164, 0.6336), (0.3714, 0.6122), (0.4539, 0.5923), (0.5, 0.6008),),
        *((0.5461, 0.5923), (0.6286, 0.6122), (0.6836, 0.6336), (0.6279, 0.6794),),
        *((0.5563, 0.7106), (0.5, 0.7165), (0.4437, 0.7106), (0.3721, 0.6794),),
        # inner lip
        *((0.3311, 0.6342), (0.4298, 0.6312), (0.5, 0.6334), (0.5702, 0.6312),),
        *((0.6689, 0.6342), (0.5689, 0.6517), (0.5, 0.6578), (0.4311, 0.6517),),
    ]
)
# fmt: on
"""The 68 points of the mean face ``(68, 2)`` in its unit square: x to the right, y down."""
FACE_68.setflags(write=False)

# The upper edge of a brow has 5 of WFLW's 9 points; eyelids have one point more; pupils (96, 97) have no counterpart.
WFLW_TO_68 = (
    *range(0, 33, 2),
    *range(33, 38),
    *range(42, 47),
    *range(51, 60),
    *(60, 61, 63, 64, 65, 67),
    *(68, 69, 71, 72, 73, 75),
    *range(76, 96),
)
"""For each point of scheme 68 the point of scheme 98 at the same place."""
