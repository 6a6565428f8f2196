"""Studies: the effect of settings on score, cost and forgetting, side by side on the same rows.

``studies/NAME`` has the request, the result and the pictures; ``studies/.cells`` has the measurements
of all studies (:mod:`luthier.workflows.study.cells`).
"""
