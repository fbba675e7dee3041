"""Quality of a bundle's pictures: as a set compared with reference pictures, and one by one with a float bundle's."""
