"""A wire between a hospital and the centre that can be cut: bytes stop, connections stay open, as when a
firewall drops packets. Nothing is answered, and nobody is told."""

import asyncio
import threading


class Wire:
    """Forwards `localhost:port` to `target`, in a thread of its own."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._whole = asyncio.Event()
        self._whole.set()
        started = threading.Event()
        self.port = 0

        def run() -> None:
            asyncio.set_event_loop(self._loop)
            server = self._loop.run_until_complete(asyncio.start_server(self._forward, "127.0.0.1", 0))
            self.port = server.sockets[0].getsockname()[1]
            started.set()
            self._loop.run_forever()

        threading.Thread(target=run, daemon=True).start()
        started.wait()

    def cut(self) -> None:
        """From now on nothing gets through."""
        self._loop.call_soon_threadsafe(self._whole.clear)

    def mend(self) -> None:
        """From now on new connections get through; what was under way is lost."""
        self._loop.call_soon_threadsafe(self._whole.set)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._whole.wait()
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.close()
            return
        await asyncio.gather(self._pump(reader, back), self._pump(there, writer), return_exceptions=True)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                if not self._whole.is_set():
                    await self._whole.wait()
                    return  # those bytes are lost, and with them the connection
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()
