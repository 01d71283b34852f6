package main

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb/types"
)

// NewClient returns a client of cfg with the settings that matter to a Store.
// more comes after them. An HTTP client of your own in cfg stays as it is.
//
// The SDK repeats a call whose reply was lost or that was throttled, which the
// conditions of a Store make harmless. Its pauses of up to 20 seconds are for
// batch jobs: a store call has Options.StoreTimeout in all, 1 second by default,
// and the middleware sends it a second time by itself. So there are two tries
// with a short pause. The context of a call bounds all of them.
func NewClient(cfg aws.Config, more ...func(*dynamodb.Options)) *dynamodb.Client {
	settings := func(o *dynamodb.Options) {
		o.Retryer = retry.NewStandard(func(o *retry.StandardOptions) {
			o.MaxAttempts = 2
			o.MaxBackoff = 50 * time.Millisecond
		})
		// The default of 10 would open and close connections all the time in a
		// service with more requests at once than that. What else cfg says of the
		// connections stays, a bundle of certificates (AWS_CA_BUNDLE), say.
		if c, ok := o.HTTPClient.(*awshttp.BuildableClient); ok {
			o.HTTPClient = c.WithTransportOptions(func(t *http.Transport) { t.MaxIdleConnsPerHost = 100 })
		}
	}
	return dynamodb.NewFromConfig(cfg, append([]func(*dynamodb.Options){settings}, more...)...)
}

// CreateTable makes a table for a Store and waits until it can be used. It
// returns nil if the table is there. In production the table is part of the
// infrastructure; the README has what it needs.
func CreateTable(ctx context.Context, client *dynamodb.Client, table string) error {
	_, err := client.CreateTable(ctx, &dynamodb.CreateTableInput{
		TableName:            &table,
		BillingMode:          types.BillingModePayPerRequest,
		AttributeDefinitions: []types.AttributeDefinition{{AttributeName: aws.String(attrID), AttributeType: types.ScalarAttributeTypeS}},
		KeySchema:            []types.KeySchemaElement{{AttributeName: aws.String(attrID), KeyType: types.KeyTypeHash}},
	})
	if there := new(types.ResourceInUseException); err != nil && !errors.As(err, &there) {
		return err
	}
	return dynamodb.NewTableExistsWaiter(client, func(o *dynamodb.TableExistsWaiterOptions) {
		o.MinDelay, o.MaxDelay = 100*time.Millisecond, time.Second
	}).Wait(ctx, &dynamodb.DescribeTableInput{TableName: &table}, time.Minute)
}

// DeleteExpired has DynamoDB delete the items whose end has come. Without it the
// table grows for ever, and is right all the same.
func DeleteExpired(ctx context.Context, client *dynamodb.Client, table string) error {
	_, err := client.UpdateTimeToLive(ctx, &dynamodb.UpdateTimeToLiveInput{
		TableName:               &table,
		TimeToLiveSpecification: &types.TimeToLiveSpecification{AttributeName: aws.String(attrTTL), Enabled: aws.Bool(true)},
	})
	return err
}
