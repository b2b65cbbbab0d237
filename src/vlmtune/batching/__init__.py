"""Lengths, packing plans and collation."""
