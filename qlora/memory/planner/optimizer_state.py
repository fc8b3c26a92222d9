"""Memory of AdamW's two moments: how large they are, and where they are in each phase.

optimizer          bytes per value               on a GPU
adamw              8                             always
adamw_8bit         2, and 8 for every 256        always
paged_*            as above                      during the update; in between those of large tensors give way
offloaded_adamw    8                             chunks of them during the update; the rest is in host memory
"""

from qlora.memory.planner.workload import AdapterSizes, Workload

CHUNK_VALUES = 2**22  # of each moment of offloaded_adamw on the device at a time, in each of two buffers
CHUNK_BYTES = 2 * 4 * CHUNK_VALUES  # both moments of a chunk
UNPAGED_VALUES = 100_000  # bitsandbytes pages the moments of tensors from this size on (Optimizer8bit.get_state_buffer)
CHECKPOINT_COPIES = 3  # of the moments while a checkpoint is written: off the optimizer, as bytes, with a header


def moment_bytes(values: int, optimizer: str) -> int:
    """Bytes of AdamW's moments: 8 per value; in 8 bits 2, and two float32 absmax for every 256 values."""
    return 2 * values + 8 * -(-values // 256) if "8bit" in optimizer else 8 * values


def moments_leave_device(optimizer: str) -> bool:
    """Whether the moments can be in host memory while other tensors need the device: paged or offloaded."""
    return optimizer.startswith(("paged", "offloaded"))


def device_moments(work: Workload, updating: bool) -> int:
    """Bytes of moments on the device, those of waiting adapters included; `updating`: during the update."""
    size, cuda = moment_bytes(work.adapters.values, work.optimizer), work.device == "cuda"
    waiting = work.waiting.moments + (0 if cuda else work.waiting.host_moments)
    if work.optimizer.startswith("offloaded"):
        chunks = min(2 * CHUNK_BYTES, 2 * size)
        return waiting + (chunks * updating if cuda else size + chunks)
    paged_out = work.optimizer.startswith("paged") and cuda and not updating
    return waiting + (unpaged_moments(work.adapters, work.optimizer) if paged_out else size)


def unpaged_moments(adapters: AdapterSizes, optimizer: str) -> int:
    """Bytes of a paged optimizer's moments that stay on the device: those of small matrices."""
    return moment_bytes(adapters.values_in_tensors_below(UNPAGED_VALUES), optimizer)


def host_moments(work: Workload) -> int:
    """Bytes of moments in the host memory of a GPU's rank, without those that the driver pages."""
    offloaded = work.optimizer.startswith("offloaded")
    return work.waiting.host_moments + (moment_bytes(work.adapters.values, work.optimizer) if offloaded else 0)


def checkpoint_copies(work: Workload) -> int:
    """Bytes of the moments' copies in host memory while a checkpoint is written; small unless every weight trains."""
    return CHECKPOINT_COPIES * moment_bytes(work.adapters.values, work.optimizer) if work.adapters.kind == "full" else 0
