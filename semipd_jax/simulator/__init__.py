"""The engine on a virtual clock: the same coordinator and tuner, modelled workers."""
