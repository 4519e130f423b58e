"""A seeded corpus of labelled prose in ten domains, generated from the tables beside this file."""
