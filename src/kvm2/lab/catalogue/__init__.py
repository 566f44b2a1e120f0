"""The catalogue of users' pains: each public issue as a host, what was asked there, and what must be answered."""
