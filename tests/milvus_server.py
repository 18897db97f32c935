"""Milvus Lite as a server of its own, for tests that need two clients, or a server that goes away."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor


def free_port():
    "A port that nobody listens on."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class LiteServer:
    "A process that serves a folder by TCP."

    def __init__(self, folder):
        self.folder = str(folder)
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self, patience=240):
        "Start it, and wait until it listens."
        command = [sys.executable, "-m", "milvus_lite", "server", "--data-dir", self.folder]
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.process = subprocess.Popen([*command, "--port", str(self.port)], **quiet)
        end = time.monotonic() + patience
        while time.monotonic() < end:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert self.process.poll() is None, "the server ended"
                time.sleep(0.1)
        raise AssertionError("the server did not start")

    def kill(self):
        "As a machine that loses its power."
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self):
        "End it."
        self.process.terminate()
        self.process.wait()


def denying_server():
    "A gRPC server that accepts nobody; (server, address)."
    import grpc

    class Denies(grpc.GenericRpcHandler):
        def service(self, details):
            def refuse(request, context):
                context.abort(
                    grpc.StatusCode.UNAUTHENTICATED,
                    "auth check failure, please check username and password are correct",
                )

            return grpc.unary_unary_rpc_method_handler(refuse)

    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((Denies(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, f"http://127.0.0.1:{port}"
