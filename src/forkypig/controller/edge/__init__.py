"""What every call passes on its way in and out: who it is from, how often, whether it came before."""
