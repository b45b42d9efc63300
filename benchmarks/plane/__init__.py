"""The parts of benchmarks/video_plane.py."""
