"""Measuring a user's model: what routing delivered, what policies cost, calibration."""
