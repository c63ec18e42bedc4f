"""The emulated driver's shared memory: what the engine of several processes is tested on."""

from __future__ import annotations

import ctypes as c
import os

import numpy as np
import pytest

BYTES = 2 << 20
POSIX_FD = 1
READWRITE = 3


class Properties(c.Structure):
    _fields_ = [(name, c.c_int) for name in ("type", "handle_types", "location_type", "gpu")]


class Access(c.Structure):
    _fields_ = [(name, c.c_int) for name in ("location_type", "gpu", "flags")]


class Driver:
    """The calls of one process; every result is checked unless it is asked for."""

    def __init__(self, machine):
        self.machine = machine

    def __call__(self, name, *args):
        types = [type(a) if isinstance(a, c._SimpleCData) else c.c_void_p for a in args]
        return self.machine.driver(name, *types)(*args)

    def make(self, name, *args):
        value = c.c_uint64()
        assert self(name, c.byref(value), *args) == 0, name
        return value

    def create(self, handle_types=POSIX_FD):
        properties = Properties(1, handle_types, 1, 0)
        return self.make("cuMemCreate", c.c_uint64(BYTES), c.byref(properties), c.c_uint64(0))

    def map(self, handle):
        """The memory as an array."""
        zero = c.c_uint64(0)
        address = self.make("cuMemAddressReserve", c.c_uint64(BYTES), zero, zero, zero)
        assert self("cuMemMap", address, c.c_uint64(BYTES), zero, handle, zero) == 0
        access = Access(1, 0, READWRITE)
        assert (
            self("cuMemSetAccess", address, c.c_uint64(BYTES), c.byref(access), c.c_size_t(1)) == 0
        )
        memory = (c.c_uint8 * BYTES).from_address(address.value)
        return np.frombuffer(memory, np.uint8), address

    def unmap(self, address):
        assert self("cuMemUnmap", address, c.c_uint64(BYTES)) == 0
        assert self("cuMemAddressFree", address, c.c_uint64(BYTES)) == 0

    def export(self, handle):
        descriptor = c.c_int(-1)
        result = self(
            *("cuMemExportToShareableHandle", c.byref(descriptor), handle),
            *(c.c_int(POSIX_FD), c.c_uint64(0)),
        )
        return result, descriptor.value


@pytest.fixture
def drivers(new_machine):
    """Two machines share nothing but what they export to each other, as two processes."""
    return Driver(new_machine()), Driver(new_machine())


def test_memory_that_another_process_maps(drivers):
    ours, theirs = drivers
    memory, address = ours.map(ours.create())
    # From any address in it, as of a buffer of XLA's.
    handle = ours.make("cuMemRetainAllocationHandle", c.c_void_p(address.value + 1000))
    result, descriptor = ours.export(handle)
    assert result == 0
    imported = theirs.make(
        "cuMemImportFromShareableHandle", c.c_void_p(descriptor), c.c_int(POSIX_FD)
    )
    os.close(descriptor)
    peer, peer_address = theirs.map(imported)
    assert peer_address.value != address.value
    memory[77] = 5
    assert peer[77] == 5
    peer[78] = 6
    assert memory[78] == 6
    # It lives as long as somebody has it mapped.
    assert ours("cuMemRelease", handle) == 0
    ours.unmap(address)
    assert peer[77] == 5
    theirs.unmap(peer_address)


def test_ranges_and_identities(drivers):
    driver, _ = drivers
    identities = []
    for _ in range(2):
        _, address = driver.map(driver.create())
        inside = c.c_uint64(address.value + 12345)
        base, size, identity = c.c_uint64(), c.c_uint64(), c.c_uint64()
        assert driver("cuMemGetAddressRange", c.byref(base), c.byref(size), inside) == 0
        assert (base.value, size.value) == (address.value, BYTES)
        assert driver("cuPointerGetAttribute", c.byref(identity), c.c_int(7), inside) == 0
        identities.append(identity.value)
        driver.unmap(address)
    assert identities[0] != identities[1]


def test_what_cannot_be_shared(drivers):
    driver, _ = drivers
    elsewhere = np.zeros(10)
    handle = c.c_uint64()
    address = c.c_void_p(elsewhere.ctypes.data)
    assert driver("cuMemRetainAllocationHandle", c.byref(handle), address) != 0
    result, _ = driver.export(driver.create(handle_types=0))
    assert result != 0
