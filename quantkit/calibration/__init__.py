"""Calibration: from text or chats to token windows, and from windows to layer statistics."""
