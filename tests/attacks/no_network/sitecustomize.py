"""Refuses every host lookup and connection of a process with this folder on its path; logs them in NETWORK_LOG."""

import os
import socket


def _refuse(what):
    with open(os.environ["NETWORK_LOG"], "a") as log:
        log.write(f"{what}\n")
    raise OSError(f"no network in this test: {what}")


def _getaddrinfo(host, *args, **kwargs):
    _refuse(f"look-up of {host}")


_connect = socket.socket.connect


def _connect_locally(self, address):
    # Sockets of files join the processes of one machine.
    if self.family == socket.AF_UNIX:
        _connect(self, address)
        return
    _refuse(f"connection to {address}")


socket.getaddrinfo = _getaddrinfo
socket.socket.connect = socket.socket.connect_ex = _connect_locally
