"""Intel's part.

exits.py, what an exit says; ept.py, the EPT entry's layout; vmx.py, the exit handlers; cr.py, those of
control registers; pml.py, the log of what the CPU dirtied; apic_access.py, the APIC's page in the VMCS.
"""
