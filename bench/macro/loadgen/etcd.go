package main

import (
	"context"
	"fmt"
	"time"

	"go.etcd.io/etcd/clientv3"
	"go.uber.org/zap"
)

type etcdClient struct {
	kv      clientv3.KV
	timeout time.Duration
	run     int64
}

func connectEtcd(o *options) ([]client, error) {
	connections := make([]*clientv3.Client, o.connections)
	for i := range connections {
		// One endpoint each: a client with several would move its load to others by itself.
		config := clientv3.Config{
			Endpoints:   []string{o.targets[i%len(o.targets)]},
			DialTimeout: 5 * time.Second,
			LogConfig:   &zap.Config{Level: zap.NewAtomicLevelAt(zap.FatalLevel), Encoding: "json"},
		}
		connection, err := clientv3.New(config)
		if err != nil {
			return nil, fmt.Errorf("%s: %v", config.Endpoints[0], err)
		}
		connections[i] = connection
	}
	clients := make([]client, o.clients)
	run := time.Now().UnixNano()
	for i := range clients {
		clients[i] = &etcdClient{kv: connections[i%len(connections)].KV, timeout: o.timeout, run: run}
	}
	return clients, nil
}

func etcdKey(key int) string { return fmt.Sprintf("/vm/%08d", key) }

func (c *etcdClient) claimKey(number int64) string { return fmt.Sprintf("/claim/%d/%d", c.run, number) }

func (c *etcdClient) put(key int, value []byte) error {
	ctx, cancel := context.WithTimeout(context.Background(), c.timeout)
	defer cancel()
	_, err := c.kv.Put(ctx, etcdKey(key), string(value))
	return err
}

func (c *etcdClient) get(key int) ([]byte, error) { return c.read(etcdKey(key)) }

func (c *etcdClient) read(key string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), c.timeout)
	defer cancel()
	answer, err := c.kv.Get(ctx, key)
	if err != nil || len(answer.Kvs) == 0 {
		return nil, err
	}
	return answer.Kvs[0].Value, nil
}

func (c *etcdClient) claim(number int64) error {
	ctx, cancel := context.WithTimeout(context.Background(), c.timeout)
	defer cancel()
	key := c.claimKey(number)
	isFree := clientv3.Compare(clientv3.CreateRevision(key), "=", 0)
	answer, err := c.kv.Txn(ctx).If(isFree).Then(clientv3.OpPut(key, "owner")).Commit()
	if err == nil && !answer.Succeeded {
		err = fmt.Errorf("claim: held by another")
	}
	return err
}

func (c *etcdClient) holds(number int64) (bool, error) {
	found, err := c.read(c.claimKey(number))
	return string(found) == "owner", err
}
