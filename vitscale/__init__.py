"""vitscale: pretraining of Vision Transformers on image collections too large for one machine."""
