// Rubbish of all kinds, as an admitted key that has turned bad would send it.

import crypto from 'node:crypto'
import * as formation from './formation.mjs'
import { links, request, topicName, trusted } from './network.mjs'
import { node, open, seed, send, sleep } from './node.mjs'

function rubbish (what) {
  const key = new formation.Key(seed)
  const op = ['C', 'node.advertised', 'x', new Map(), null, null]
  const block = new formation.Lane(key, trusted.networkId).append('node', [op])
  const forged = block.slice()
  forged[forged.length - 1] ^= 1
  switch (what) {
    case 'unknown': return [99, 1, 2, 3]
    case 'notCbor': return [formation.BLOCK_FRAME, 255, 255, 255]
    case 'forged': return [formation.BLOCK_FRAME, ...forged]
    case 'badAck': return [formation.ACK_FRAME, ...forged]
    case 'otherNetwork': {
      const { payload } = formation.parseSigned(block)
      return [formation.BLOCK_FRAME, ...formation.sign(key, 'block', new Uint8Array(32), payload)]
    }
  }
}

export const commands = {
  async rubbishFrames ({ peer, what }) {
    await send(links.get(peer).stream, formation.frame(Uint8Array.from(rubbish(what))))
    return {}
  },

  async oversized ({ peer }) {
    await send(links.get(peer).stream, Uint8Array.of(0xff, 0xff, 0xff, 0xff, 1))
    return {}
  },

  async badRequest ({ peer }) { return await request(peer, formation.SYNC, Uint8Array.of(1, 2, 3)) },

  async gossipRubbish ({ topic, count }) {
    const recipients = new Set()
    for (let i = 0; i < count; i++) {
      const sent = await node.services.pubsub.publish(topicName(topic), new Uint8Array(crypto.randomBytes(200)))
      for (const peer of sent.recipients) recipients.add(peer.toString())
    }
    return { recipients: [...recipients] }
  },

  async rawGossip ({ peer }) {
    const stream = await open(peer, '/meshsub/1.1.0')
    await send(stream, Uint8Array.of(4, 0xff, 0xff, 0xff, 0xff))
    await sleep(200)
    return {}
  }
}
