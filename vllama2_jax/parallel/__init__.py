"""One program over many devices: the mesh, and which of its axes every array is split over."""
