// What the drivers for Node share: kit.py's commands, payload and clocks.

import { readFileSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";

export const CONNECTIONS = 16; // of a producer's pool: one for each of the 16 that enqueue

const now = () => Number(process.hrtime.bigint()) / 1e9;
const delays = [];

const payload = (at = 0) => ({
  user: { id: "3f2b8a7e-0001", email: "somebody@example.org" },
  key: "k".repeat(24),
  at,
});

// The whole of every handler.
export function started(at) {
  if (at) delays.push(now() - at);
}

const commands = {
  async bulk(peer, dsn, mode, count) {
    const payloads = Array.from({ length: count }, () => payload());
    const client = await peer.client(dsn, mode);
    const begin = now();
    await client.bulk(payloads);
    return { rate: count / (now() - begin) };
  },

  async enqueue(peer, dsn, mode, seconds, clients) {
    const client = await peer.client(dsn, mode);
    const each = (work) => Promise.all(Array.from({ length: clients }, work));
    await each(() => client.enqueue(payload())); // the pool has its connections
    const begin = now();
    let count = 0;
    await each(async () => {
      while (now() < begin + seconds) {
        await client.enqueue(payload());
        count += 1;
      }
    });
    return { rate: count / (now() - begin) };
  },

  async latency(peer, dsn, mode, count, gap) {
    await peer.work(dsn, mode);
    const client = await peer.client(dsn, mode);
    await client.enqueue(payload(now()));
    for (let i = 0; i < 600 && !delays.length; i++) await sleep(100);
    if (!delays.length) throw new Error("nothing started in 60 s");
    await sleep(2000); // until it is idle again
    delays.length = 0;
    for (let i = 0; i < count; i++) {
      const begin = now();
      await client.enqueue(payload(begin));
      await sleep(Math.max(0, (begin + gap - now()) * 1000));
    }
    for (let i = 0; i < 100 && delays.length < count; i++) await sleep(100);
    return { seconds: delays };
  },
};

export async function main(peer) {
  const [command, ...args] = process.argv.slice(2);
  let answer = null;
  if (command === "about") {
    const url = new URL(`node_modules/${peer.name}/package.json`, import.meta.url);
    const { version } = JSON.parse(readFileSync(url));
    const { settings, tasks, left, failed } = peer;
    answer = { version, runtime: `Node ${process.versions.node}`, settings, tasks, left, failed };
  } else if (command === "work") {
    return await peer.work(...args); // which goes on
  } else if (command === "setup") {
    await peer.setup(...args);
  } else {
    const [dsn, mode, ...numbers] = args;
    answer = await commands[command](peer, dsn, mode, ...numbers.map(Number));
  }
  console.log(JSON.stringify(answer));
  process.exit(0); // how long a worker takes to stop is nobody's question here
}
