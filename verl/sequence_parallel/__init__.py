"""How sequences are laid out in a row, split over ranks and attended to."""
