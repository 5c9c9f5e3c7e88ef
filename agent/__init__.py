"""Bootwright: prepares the disks of virtual machines on a KVM host, and boots them."""
