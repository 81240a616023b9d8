"""Networks, mathematics and training stages."""
