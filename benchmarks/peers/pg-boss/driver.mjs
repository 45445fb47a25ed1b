// pg-boss.

import { PgBoss } from "pg-boss";
import { CONNECTIONS, main, started } from "./kit.mjs";

const settings = {
  // "useListenNotify" with the queue's "notify": creating a job wakes workers. "batchSize": jobs a fetch.
  // "burstWhenBatchFull": fetches again at once while fetches are full. "localConcurrency": how many fetch and complete
  // side by side in this process.
  tuned: { useListenNotify: true, notify: true, batchSize: 3000, burstWhenBatchFull: true, localConcurrency: 2 },
  defaults: {}, // a poll each 2 s fetches 1 job
};

async function start(connectionString, mode) {
  const { useListenNotify = false } = settings[mode];
  const boss = new PgBoss({ connectionString, useListenNotify, max: CONNECTIONS });
  boss.on("error", console.error);
  return await boss.start();
}

main({
  name: "pg-boss",
  settings,
  tasks: { tuned: 100_000, defaults: 100 },
  left: "SELECT count(*) FROM pgboss.job WHERE name = 'mail' AND state < 'completed'",
  failed: "SELECT count(*) FROM pgboss.job WHERE name = 'mail' AND state > 'completed'",

  async setup(dsn, mode) {
    const boss = await start(dsn, mode);
    const { notify = false } = settings[mode];
    await boss.createQueue("mail", { notify });
    await boss.stop({ graceful: false });
  },

  async client(dsn, mode) {
    const boss = await start(dsn, mode);
    return {
      enqueue: (data) => boss.send("mail", data),
      bulk: (payloads) => boss.insert("mail", payloads.map((data) => ({ data }))),
    };
  },

  async work(dsn, mode) {
    const boss = await start(dsn, mode);
    const { useListenNotify, notify, ...options } = settings[mode];
    await boss.work("mail", options, async (jobs) => {
      for (const job of jobs) started(job.data.at);
    });
  },
});
