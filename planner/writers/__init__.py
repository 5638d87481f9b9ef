"""The edges outwards: values written as documents of our own, as reports for people, and as other tools' files."""
