"""Pools: machines that are ready before they are asked for, and the leases of those that are out."""
