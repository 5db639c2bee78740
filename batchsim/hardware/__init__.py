"""Device and host configurations: a catalogue kept as data, and the transfer of a profile from one to another."""

from batchsim.hardware.catalogue import CATALOGUE, Device, device_of
from batchsim.hardware.device import Hardware

__all__ = ["CATALOGUE", "Device", "Hardware", "device_of"]
