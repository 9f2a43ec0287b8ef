// `chat join`, except that a lost connection is made again at once, however short it was: for tests that cut hundreds.
// node impatient.ts PORT NICK [ROOM]
import { join, Screen } from "../chat.ts";

const [port, nick, room] = process.argv.slice(2);
const screen = new Screen();
const options = { host: "127.0.0.1", port: Number(port), nick, room, password: "secret" };
process.exit(await join({ ...options, screen, backOffMs: () => 0 }));
