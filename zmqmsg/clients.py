"""Who asks: the client that has sent a request, for notices and for commands."""

import os

import zmq

from zmqmsg.messages import Frames
from zmqmsg.names import plain_address
from zmqmsg.sockets import Socket

# Variables in the environment of a command
PEER = "ZMQMSG_PEER"
PEER_KEY = "ZMQMSG_PEER_KEY"


def client_address(request: Frames) -> str:
    """Return the address of the client that sent ``request``.

    It is empty if libzmq keeps none, as for ZMTP 1 and 2.
    """
    try:
        address = str(request[0].get("Peer-Address"))
    except zmq.ZMQError:
        return ""
    if address.startswith("localhost:"):  # ipc: user, group and process
        return f"process {address.rpartition(':')[2]}"
    return plain_address(address)


def client_key_name(request: Frames, socket: Socket) -> str:
    """Return the name of the client's key file; empty if ``socket`` does not check keys."""
    if not socket.zap_domain:  # then the client could choose its user id itself
        return ""
    try:
        return str(request[0].get("User-Id"))
    except zmq.ZMQError:
        return ""


def environment_for(request: Frames, socket: Socket) -> dict[str, str]:
    """Return the environment of a command that answers ``request``, with who sent it.

    Nothing in it is chosen by the client: the address is the system's, and the name is that of a
    file of ours.
    """
    environment = environment_for_all()
    if address := client_address(request):
        environment[PEER] = address
    if key_name := client_key_name(request, socket):
        environment[PEER_KEY] = key_name
    return environment


def environment_for_all() -> dict[str, str]:
    """Return the environment of a command that answers all requests.

    It lacks the variables of ``environment_for``, which an outer zmqmsg may have set for us.
    """
    return {name: value for name, value in os.environ.items() if name not in (PEER, PEER_KEY)}
