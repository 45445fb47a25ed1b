// graphile-worker.

import { Logger, makeWorkerUtils, run, runMigrations } from "graphile-worker";
import { CONNECTIONS, main, started } from "./kit.mjs";

const settings = {
  // As in its own performance test: "localQueue.size", a batch of jobs pulled at once; "completeJobBatchDelay" 0,
  // completions of the same moment in one DELETE; maxPoolSize: concurrentJobs + 1.
  tuned: {
    concurrentJobs: 24,
    maxPoolSize: 25,
    localQueue: { size: 500 },
    completeJobBatchDelay: 0,
    failJobBatchDelay: 0,
  },
  defaults: {},
};
const logger = new Logger(() => () => {}); // by default it prints two lines a job

main({
  name: "graphile-worker",
  settings,
  tasks: { tuned: 100_000, defaults: 10_000 },
  left: "SELECT count(*) FROM graphile_worker._private_jobs", // done is deleted
  failed: "SELECT count(*) FROM graphile_worker._private_jobs WHERE last_error IS NOT NULL",

  setup: (connectionString) => runMigrations({ connectionString, logger }),

  async client(connectionString) {
    const utils = await makeWorkerUtils({ connectionString, maxPoolSize: CONNECTIONS, logger });
    return {
      enqueue: (payload) => utils.addJob("mail", payload),
      bulk: (payloads) => utils.addJobs(payloads.map((payload) => ({ identifier: "mail", payload }))),
    };
  },

  work: (connectionString, mode) =>
    run({
      taskList: { mail: async (payload) => started(payload.at) },
      preset: { worker: { connectionString, ...settings[mode] } },
      logger,
    }),
});
