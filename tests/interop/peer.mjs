// A peer of a Formation network in another language, for the tests beside it.
// Commands are JSON objects, one a line, on stdin; answers ({id, ok} or {id, error}) and the first word ({ready}) on stdout.

import readline from 'node:readline'
import { node } from './node.mjs'
import * as harm from './harm.mjs'
import * as network from './network.mjs'
import * as streams from './streams.mjs'

const commands = { ...streams.commands, ...network.commands, ...harm.commands }
const out = value => process.stdout.write(JSON.stringify(value) + '\n')

out({ ready: node.peerId.toString(), addresses: node.getMultiaddrs().map(String) })
const lines = readline.createInterface({ input: process.stdin })
// Whoever started us is gone: so are we.
lines.on('close', () => process.exit(0))
for await (const line of lines) {
  const { id, command, ...options } = JSON.parse(line)
  commands[command](options).then(ok => out({ id, ok }), error => out({ id, error: `${error.name}: ${error.message}` }))
}
