"""Code that an export carries: the two modules import nothing but torch and transformers, and are copied verbatim."""
