// What the released server's own provider seals and opens, one JSON request a line, one answer a line.
import { createInterface } from "node:readline";

const { localEncryptedProvider: provider } = await import(process.argv[2]);

for await (const line of createInterface({ input: process.stdin })) {
  const { seal, open } = JSON.parse(line);
  const answer =
    open === undefined
      ? await provider.createSecret({ value: seal })
      : await provider.resolveVersion({ material: open }).catch((error) => ({ error: error.message }));
  process.stdout.write(JSON.stringify(answer) + "\n");
}
