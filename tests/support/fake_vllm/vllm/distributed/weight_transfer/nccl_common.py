"""The trainer is rank 0 of the group, and its store is where the workers meet it."""

from types import SimpleNamespace

from torch.distributed import TCPStore


def trainer_init(init_info):
    store = TCPStore(init_info["master_address"], init_info["master_port"], is_master=True, wait_for_workers=False)
    store.set("joined", "trainer")
    return SimpleNamespace(group=SimpleNamespace(store=store, socket=None), sent=0)
