"""Tests; the folders mirror moejax/."""
