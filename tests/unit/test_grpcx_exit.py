"""A process that forgets running calls still ends."""

import subprocess
import sys

FORGETFUL = """
import asyncio, gc
import grpc
from kvmesh.grpcx import Server, channel

gc.disable()

def register(server):
    async def never(request, context):
        await asyncio.sleep(100)

    methods = {"Z": grpc.unary_unary_rpc_method_handler(never)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("x.Y", methods),))

async def forget():
    server = Server("127.0.0.1:0", register, [])
    await server.start()
    ch = channel(server.address)
    call = ch.unary_unary("/x.Y/Z")(b"")
    await asyncio.sleep(0.3)
    knot = [server, ch, call]
    knot.append(knot)

loop = asyncio.new_event_loop()
loop.run_until_complete(forget())
for task in asyncio.all_tasks(loop):
    task.cancel()
loop.run_until_complete(asyncio.sleep(0))
loop.close()
gc.collect()
print("collected")
"""


def test_calls_that_were_forgotten_do_not_hang_the_garbage_collector():
    done = subprocess.run([sys.executable, "-c", FORGETFUL], capture_output=True, text=True, timeout=30)
    assert done.stdout == "collected\n", done.stderr
