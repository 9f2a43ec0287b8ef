// `chat join` without a back-off: it reconnects at once, for tests that cut its connection hundreds of times.
// Usage: node impatient.ts PORT NICK [ROOM]
import { join, openUi } from "../chat.ts";

const [port, nick, room] = process.argv.slice(2);
const options = { host: "127.0.0.1", port: Number(port), nick, room, password: "secret" };
process.exit(await join({ ...options, ui: openUi(), backOffMs: () => 0 }));
