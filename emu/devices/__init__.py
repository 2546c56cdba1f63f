"""The PC's devices behind I/O ports, and those behind memory.

bus.py: which device answers a port. serial.py: 16550 at 0x3f8. exitport.py: how a payload ends the
run. pic.py: the 8259 pair, the interrupt source of vCPU 0. pit.py: the 8254 timer on logical time.
mmio_test.py: the memory-mapped device that the payloads poke.

rdma.py: an RDMA engine that works on guest memory; rdma_mr.py: the regions it was given, umem_odp.py: how it
reaches them without pins. sva.py: a device that translates by the VMM's own page tables.
pci_bar.py: a PCI function's memory, mapped raw. hmm_device.py: a device to whose memory the VMM's pages go.
flash.py: NOR flash, a read-only memory slot for reads and a device for writes.
gvt.py: a GPU whose tables in guest memory are shadowed by write tracking.
"""
